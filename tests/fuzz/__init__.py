"""Bad input by the thousand: what is asked works or is refused as documented, and what comes after is as before.

``KVENV_FUZZ=50 python -m pytest tests/fuzz`` tries fifty times as many examples as ``make test``.
"""
