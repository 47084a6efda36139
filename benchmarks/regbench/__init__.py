"""In-context learning of regular languages against state size: ``python -m benchmarks.regbench --sweep quick``.

``automata.py`` makes the languages and their examples, ``task.py`` the batches, ``sweeps.py`` says what is trained.
What it shares with other benchmarks of trained mixers lies in ``benchmarks/sweep``.
"""
