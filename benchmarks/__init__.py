"""Measurements on made-up and real data; `python -m benchmarks.<name>`."""

RECBOLE_FIELDS = {  # what RecBole's models ask of a configuration
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "device": "cpu",
    "dataset": "made-up",
}


class Settings(dict):
    """A configuration as RecBole's: a setting that is not there is None."""

    def __missing__(self, key):
        return None
