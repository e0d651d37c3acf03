"""The sources of the vectors. Nothing here imports zcproto: it is a second, independent implementation."""
