"""The files of the specification agree, and the language rules hold."""
