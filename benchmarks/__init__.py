"""The benchmarks: statecache beside its peers, in turn, on the same real servers. ``python -m benchmarks --list``.

``harness.py`` runs rows and takes their samples, ``report.py`` judges and prints them, ``servers.py`` starts what they run on,
``workload.py`` is what is written and read, ``peers_*.py`` are what others do instead; each other file is a theme's rows.
"""
