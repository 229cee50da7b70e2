"""The typed façade of all operations (`ops`) and the backends that serve it (`reference`).

A backend is chosen by a platform; models and runner see `ops` only.
"""
