"""Typed configurations: what reads and checks a YAML file, and the keys that recipes share.

loader  from a parsed file to a dataclass, with all problems at once
keys    the keys that recipes inherit
docs    what --help and KEYS.md say of a key
"""
