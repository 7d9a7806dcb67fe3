"""Studies of the method: each file answers one question.

A `.yaml` file that has points is a sweep (`python launch/sweep.py FILE`), judged by
`python -m studies.judge FILE`; flags_*.yaml hold what sweeps share. `demo`, `miners` and `estimate`
are commands of their own. RESULTS.md has what came out.
"""
