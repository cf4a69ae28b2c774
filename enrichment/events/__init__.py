"""From a row to its event: the codec, what is compiled for it from the declaration, and the shortcut past a row."""
