"""A stand-in for a ChainerMN communicator of one rank that has heard the other ranks' answers."""


class FakeComm:
    """Rank `rank` of `size`; `others` are what the other ranks contribute to every collective."""

    def __init__(self, rank=0, others=()):
        self.rank = rank
        self.size = 1 + len(others)
        self.intra_rank = rank
        self.others = list(others)
        self.barriers = 0

    def gather_obj(self, obj):
        return self.allgather(obj)

    def allgather(self, obj):
        answers = list(self.others)
        answers.insert(self.rank, obj)
        return answers

    def bcast_obj(self, obj):
        return obj

    def allreduce_obj(self, obj):
        return sum(self.others, obj)

    def Barrier(self):  # noqa: N802 (mpi4py's name)
        self.barriers += 1
