"""Text at equal state: ``python -m benchmarks.lm --sweep quick``.

``reading.py`` is the task, ``sweeps.py`` says what is trained, ``training.py`` trains it with the model and the trainer
of ``blurry_attn.lm``, ``report.py`` makes table and plot. What it shares with other benchmarks of trained mixers lies
in ``benchmarks/sweep``.

The text is the Python library's sources, or prose from a folder, a tenth of whose files is held out. Debian has some:
the documentation of the kernel, 21 MB in 2841 files without its translations::

    apt-get download linux-doc-6.1 && dpkg-deb -x linux-doc-6.1_*.deb .try/deb
    mv .try/deb/usr/share/doc/linux-doc-6.1/html/_sources .try/linux-doc-6.1 && rm -r .try/linux-doc-6.1/translations
    python -m benchmarks.lm --sweep text --text .try/linux-doc-6.1
"""
