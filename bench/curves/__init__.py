"""How cost grows: curves and not points. `zcproto bench --curves`.

echoes        what a request costs a server, by its payload and by how many go in one write
watch         a load of many connections, with the server's figures read all the time
tokens        what the check of a token costs, and its memory, by live sessions
fit           how a series grows: least squares, and the words for it (pure)
curve         one series with its fits
run           all of them in order
plot, report  how they are shown
"""
