"""Files of other tools: one module a format, each with what it imports and, for some, what it exports.

msm4sr      pickles of vectors by item, as MSM4SR's authors released them
mmsbr       the arrays of MMSBR's authors, for a folder that is there (whole folders: ``released.py``)
unisrec     UniSRec's headerless vectors, index files and split sequences; also exported
mmrec       MMRec's labelled interactions and arrays; also exported
recbole     RecBole's atomic files, vectors in columns of the type float_seq among them

An importer reads everything into an `imported.Imported`; `imported.make_folder` and `imported.add_features` write it.
"""
