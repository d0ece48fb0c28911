"""Makes dataset folders: a made-up shop, and item features out of texts, pictures or vectors made elsewhere.

Run ``python -m dataset_prep --help``. The folder's format is described in ``recbole_mm.data.layout``.
"""
