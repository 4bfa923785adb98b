"""Embeddings: y[z, t] = W[id(z, t)].

The contribution of sample z to a row of W is the sum of gy[z, t] over the tokens t that looked the
row up; to all other rows it is zero.
"""

import chainer
from chainer.functions.connection.embed_id import EmbedIDFunction

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import EmbedTerm


@register(EmbedIDFunction)
def embed_id(use):
    ids, gy = use.in_data[0], use.out_grad[0]
    n = use.n_samples
    if use.function.ignore_label is not None:
        xp = chainer.backend.get_array_module(ids)
        ids = xp.where(ids == use.function.ignore_label, -1, ids)
    return EmbedTerm(ids.reshape(n, -1), gy.reshape(n, -1, gy.shape[-1]), use.shape[0])
