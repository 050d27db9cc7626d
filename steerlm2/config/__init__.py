"""Typed configurations: the loader, and the keys that recipes share."""
