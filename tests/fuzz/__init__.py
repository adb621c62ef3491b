"""Random calls of every public loss, each checked against float64: run by ``make fuzz``.

``calls`` makes one call from a seed and a number, ``forms`` has the public functions, ``checks``
compares results and memory, ``invalid`` makes arguments that must be refused, ``worker`` runs
calls in processes of their own, and ``__main__`` distributes and reports them.
"""
