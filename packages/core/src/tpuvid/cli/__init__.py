"""The ``tpuvid`` command: the only folder that prints."""
