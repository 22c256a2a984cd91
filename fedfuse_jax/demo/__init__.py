"""The main job: a FedJAX server learns handwritten digits while a quarter of its clients is bad.

    python -m fedfuse_jax.demo --attack scaled

`__main__` and `options` read the command line, `attacks` says what the bad clients do and `rules`
how the server aggregates, `simulation` is the federation, `report` shows what came of it. Without
bad clients, `--private` shows what noise costs (`privacy`), `--compress` what is saved by sending
less (`compression`).
"""
