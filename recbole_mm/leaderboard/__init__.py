"""Tables, statistics and views of recorded runs: ``python -m recbole_mm.leaderboard``."""
