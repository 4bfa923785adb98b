"""The two names of pkg_resources that chainer.testing uses, on the standard library's metadata."""

import importlib.metadata


class ResolutionError(Exception):
    """A requirement is not installed."""


class WorkingSet:
    """The installed distributions."""

    def require(self, *requirements):
        """Raise :class:`ResolutionError` unless all requirements are met."""
        from packaging.requirements import Requirement

        for text in requirements:
            requirement = Requirement(text)
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                raise ResolutionError(f'{requirement.name} is not installed') from None
            if not requirement.specifier.contains(version, prereleases=True):
                raise ResolutionError(f'{text} is not met by {requirement.name} {version}')
