"""Multi-query associative recall against state size: ``python -m benchmarks.mqar --sweep quick``.

``recall.py`` is the task, ``sweeps.py`` says what is trained. What it shares with other benchmarks of trained mixers
lies in ``benchmarks/sweep``.
"""
