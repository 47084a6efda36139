"""Speed and memory of attention operators against sequence length: ``python -m benchmarks.speed --device cpu``.

``cases.py`` says what is measured on each device, ``providers/`` holds the operators, ``meters/`` how a device measures
time and memory, ``report.py`` the table, the checks and the plot. A further operator is a function registered in
``providers/``; a further device is a meter and a suite of cases.
"""
