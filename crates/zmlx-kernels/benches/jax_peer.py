"""The peer of `cargo bench -p zmlx-kernels`: the same functions, compiled by XLA.

Reads a name a line, runs that function once on arrays that stay, and answers with the seconds it took.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
N, R, C = 16 * 1024 * 1024, 4096, 4096
x, y = (jnp.asarray(rng.standard_normal(N, dtype=np.float32)) for _ in range(2))
m = jnp.asarray(rng.standard_normal((R, C), dtype=np.float32))
w = jnp.ones(C, jnp.float32)
logits = jnp.asarray(rng.standard_normal((4096, 128), dtype=np.float32))
K = 0.7978845608028654


def gating(r):
    p = jax.nn.softmax(r, -1)
    top, index = jax.lax.top_k(p, 8)
    return top / top.sum(-1, keepdims=True), index


FUNCTIONS = {
    "mish": (jax.jit(lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x)))), (x,)),
    "gelu_tanh": (jax.jit(lambda x: 0.5 * x * (1 + jnp.tanh(K * (x + 0.044715 * x * x * x)))), (x,)),
    "silu_mul": (jax.jit(lambda a, b: jax.nn.silu(a) * b), (x, y)),
    "softmax": (jax.jit(lambda m: jax.nn.softmax(m, -1)), (m,)),
    "rms_norm": (jax.jit(lambda m, w: m * jax.lax.rsqrt(jnp.mean(m * m, -1, keepdims=True) + 1e-5) * w), (m, w)),
    "top_k_gating": (jax.jit(gating), (logits,)),
}

print("jax", jax.__version__, flush=True)
for line in sys.stdin:
    function, arguments = FUNCTIONS[line.strip()]
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    seconds = time.perf_counter() - start
    del result
    print(repr(seconds), flush=True)
