"""What can be found out about a machine before a run: versions, devices, memory, ports, disk, a model's archive.

finding.py     one result, and the table of many
gather.py      the results of several nodes, brought together through a directory
versions.py    the supported versions of the stack
machine.py     devices, memory, ports, directories, disk
archive.py     what a .nemo says of itself, without loading or unpickling it
"""
