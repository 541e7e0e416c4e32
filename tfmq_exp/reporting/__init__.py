"""Tables and figures from the files of runs. Imports nothing else of this project."""
