"""What the benchmarks of trained mixers share: many small models trained at once, their results, and the report.

A benchmark gives a task (``task.py``) and sweeps of points (``command.py``, which is the command line). ``model.py``
holds the stack of models, ``training.py`` trains it, ``results.py`` keeps one line per finished model, ``report.py``
makes the table and the plot.
"""
