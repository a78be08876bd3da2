"""The five families of puzzles, one in each file: draw a problem, and write its worked and terse solutions."""
