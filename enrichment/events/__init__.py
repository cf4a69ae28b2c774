"""From a row to its event: what is compiled of a declaration, the codec that uses it, and the shortcut past a row."""
