"""Inputs that mean harm to a sparse method. Each changes q, k and v [1, H, L, D] in place."""

import torch


def smooth(heads=2, length_q=1024, length_k=1024, dim=32, seed=5):
    """q, k, v whose neighbours resemble each other, so that pooling has something to gain."""
    g = torch.Generator().manual_seed(seed)

    def make(n):
        steps = torch.randn(1, heads, n, dim, generator=g)
        return 0.95 * steps.cumsum(2) / torch.arange(1, n + 1).sqrt()[:, None] + 0.3 * steps

    return make(length_q), make(length_k), make(length_k)


def needle(q, k, v):
    """One key that every query looks for."""
    place = k.shape[2] * 2 // 3
    k[:, :, place] = 40 * q.mean(2)
    v[:, :, place] = 9.0


HARMFUL = {
    "one giant outlier key": lambda q, k, v: k[:, :, 133].mul_(1e3),
    "one giant outlier value": lambda q, k, v: v[:, :, 133].mul_(1e3),
    "constant rows": lambda q, k, v: (q.fill_(1.0), k.fill_(0.5), v.fill_(2.0)),
    "zeros": lambda q, k, v: (q.zero_(), k.zero_(), v.zero_()),
    "a needle": needle,
    "iid noise": lambda *qkv: [t.normal_(generator=torch.Generator().manual_seed(seed)) for seed, t in enumerate(qkv)],
    "huge logits": lambda q, k, v: (q.mul_(1e2), k.mul_(1e2)),
    "huge logits of either sign": lambda q, k, v: (q.mul_(1e2), k.mul_(1e2)[:, :, ::2].neg_()),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
