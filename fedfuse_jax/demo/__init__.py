"""The main job: a FedJAX server learns handwritten digits while a quarter of its clients is bad.

    python -m fedfuse_jax.demo --attack scaled

`__main__` reads the command line, `attacks` says what the bad clients do, `simulation` is the
federation, `report` shows what came of it.
"""
