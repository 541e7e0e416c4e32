"""Tables, figures and one HTML page, made from the files of runs."""
