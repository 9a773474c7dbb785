"""The array frameworks that losses accept. Each implements the protocol in `protocol.py`."""
