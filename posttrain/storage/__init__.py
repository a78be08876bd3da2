"""Copies of a run at a URI (a folder, s3://, gs://, az://), from which another host can continue it.

    store.py     objects by name: create one that must not exist, read, list
    mirror.py    a folder's files as objects named by their content, and manifests of which each is one state of the run

A manifest is created under the next number and never changed. Of two hosts that both believe to hold the run, only one
can create it; the other finds a higher epoch there and stops. So a host that was cut off and comes back writes nothing.
"""
