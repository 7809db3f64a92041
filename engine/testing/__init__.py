"""What tests of lamina and of its backends are made of; shipped for the authors of backends.

`archives` builds layers and images, also hostile ones; `trees` reads a tree into comparable values;
`snapshotter_suite` checks a backend against the contract. Needs no test framework.
"""
