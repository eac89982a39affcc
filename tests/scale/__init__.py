"""The cold tier at size: many more instances than Redis has room for. See ``coldtier``."""
