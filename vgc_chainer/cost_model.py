"""When compression pays: the communication cost model of the paper (PAPER.md section 10, [R; D]).

p workers, N parameters of 32 bits, beta seconds a bit; latency is ignored, as in the paper::

    ring allreduce             T_r  = 2 (p - 1) N s beta / p
    pipelined ring allgatherv  T_v <= (sum_i n_i + (p - 1) m) beta

n_i are the bits of worker i, m those of a pipeline block. With compression ratio c (parameters /
elements sent, an element being a 32-bit word) sum_i n_i = p N s / c, so that for small m
``T_r / T_v >= 2 (p - 1) c / p^2``: to be faster than allreduce needs c > p^2 / (2 (p - 1)), about
p / 2.
"""

import dataclasses

BITS = 32


def ring_allreduce_seconds(workers, parameters, bandwidth):
    """T_r.

    Args:
        workers: p, >= 1.
        parameters: N.
        bandwidth: Bits a second of each worker's link, 1 / beta.
    """
    return 2 * (workers - 1) * parameters * BITS / (workers * bandwidth)


def allgatherv_seconds(workers, parameters, bandwidth, ratio, block=0):
    """Bound on T_v.

    Args:
        workers, parameters, bandwidth: As above.
        ratio: Compression ratio c: parameters / elements sent per step and worker.
        block: Pipeline block m, in bits.
    """
    if workers == 1:
        return 0.0
    return (workers * parameters * BITS / ratio + (workers - 1) * block) / bandwidth


def break_even_ratio(workers):
    """Smallest ratio at which allgatherv of words is no slower than allreduce: p^2 / (2 (p-1)).

    Zero for one worker, who communicates nothing.
    """
    return workers**2 / (2 * (workers - 1)) if workers > 1 else 0.0


@dataclasses.dataclass
class Step:
    """Time of one training step of one worker, in seconds.

    Attributes:
        compute: Forward, backward and update without compression.
        extra: What compression adds: second moments, compress and decode.
    """

    compute: float
    extra: float = 0.0

    def plain(self, workers, parameters, bandwidth):
        """Step time with allreduce; nothing overlaps."""
        return self.compute + ring_allreduce_seconds(workers, parameters, bandwidth)

    def compressed(self, workers, parameters, bandwidth, ratio):
        """Step time with compression; nothing overlaps."""
        return (
            self.compute + self.extra + allgatherv_seconds(workers, parameters, bandwidth, ratio)
        )

    def speed_up(self, workers, parameters, bandwidth, ratio=None):
        """Samples a second of `workers` workers over those of one without communication.

        Args:
            ratio: Compression ratio, or None for allreduce.
        """
        if ratio is None:
            return workers * self.compute / self.plain(workers, parameters, bandwidth)
        step = self.compressed(workers, parameters, bandwidth, ratio)
        return workers * self.compute / step

    def break_even_bandwidth(self, workers, parameters, ratio):
        """Bandwidth in bits a second below which compression makes the step shorter.

        Zero if it never does; infinite if it always does.
        """
        saved = ring_allreduce_seconds(workers, parameters, 1.0) - allgatherv_seconds(
            workers, parameters, 1.0, ratio
        )
        if saved <= 0:
            return 0.0
        return saved / self.extra if self.extra else float('inf')
