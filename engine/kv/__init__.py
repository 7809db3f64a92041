"""LMDB, and nothing else knows it: environments, transactions, typed tables, errors mapped.

`keys` encodes composite keys, `environment` opens files and transactions (with `opening`, `turn`,
`gate` and `faults`), `table` reads and writes records, `schema` names every table of a store.
"""
