"""How cost grows, as curves: `python -m bench curves`.

echoes        the cost of a request, by its payload and by how many are in one write
watch         a load of many connections, with samples of the server's figures
tokens        the cost of a token check and its memory, by live sessions
fit           how a series grows: least squares, and the words for it (pure)
curve         one series with its fits
run           all of them in order
plot, report  how they are shown
"""
