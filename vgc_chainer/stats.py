"""How much was sent: the two compression ratios and the counts behind them."""

import dataclasses


@dataclasses.dataclass
class Traffic:
    """Sums over steps and ranks; equal on every rank.

    Attributes:
        steps: Steps counted.
        ranks: Ranks counted in each step.
        parameters: Sum over steps of the number of parameters of the model.
        elements: Parameters sent, summed over steps and ranks.
        wire_bytes: Bytes that the ranks sent, status and headers included, summed likewise. A
            rank's message counts once, however many receive it.
    """

    steps: int = 0
    ranks: int = 0
    parameters: int = 0
    elements: int = 0
    wire_bytes: int = 0

    def add(self, parameters, elements, wire_bytes):
        """Count one step.

        Args:
            parameters: Number of parameters of the model.
            elements: Parameters sent by each rank.
            wire_bytes: Bytes sent by each rank.
        """
        self.steps += 1
        self.ranks = len(elements)
        self.parameters += parameters
        self.elements += sum(elements)
        self.wire_bytes += sum(wire_bytes)

    def __sub__(self, earlier):
        return Traffic(
            self.steps - earlier.steps,
            self.ranks,
            self.parameters - earlier.parameters,
            self.elements - earlier.elements,
            self.wire_bytes - earlier.wire_bytes,
        )

    def copy(self):
        return dataclasses.replace(self)

    @property
    def compression_ratio(self):
        """(number of parameters) / (average number sent per step and worker): PAPER.md 9, [R].

        Infinite if nothing was sent; NaN before the first step.
        """
        return _ratio(self.parameters * self.ranks, self.elements)

    @property
    def wire_ratio(self):
        """float32 bytes of the whole gradient / bytes on the wire, headers included [C]."""
        return _ratio(4 * self.parameters * self.ranks, self.wire_bytes)

    @property
    def elements_sent(self):
        """Average number of parameters sent per step and worker."""
        return self.elements / (self.steps * self.ranks) if self.steps else float('nan')


def _ratio(numerator, denominator):
    if not numerator:
        return float('nan')
    return numerator / denominator if denominator else float('inf')
