"""Arithmetic of memory and time: what a layout needs on each GPU, and how long a step takes. Pure functions of numbers.

shapes.py       the sizes of a model, from a catalogue, a Hugging Face configuration or a .nemo's
parameters.py   parameters and forward operations, by rank
memory.py       bytes on one GPU by part, in the update and in generation
time.py         seconds of a step by part
layouts.py      which layouts are possible, which fit, in what order
recipes.py      the same for a training configuration
"""
