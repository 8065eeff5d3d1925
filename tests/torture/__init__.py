"""What users' machines do to programs: kills, damaged files, full and read-only disks, and any arguments at all.

    python -m torture --kills 100 --damages 1000 --arguments 2000      (make torture)

A run of its own, since it forks children that must not inherit a started JAX; tests/together/test_torture.py runs a short form.
It ends with a table of counts, and with exit code 1 at the first promise that is broken.
"""
