"""One server in several processes: everything that exists only because there are several.

    supervisor    forks the others, and starts those again that end
    coordinator   a Server that accepts nothing: what must exist once, served to the workers over a link
    worker        a Server on the inherited sockets

Reading order: supervisor.py, processes.py (what each process does), fleet.py (what they share), link.py (how they
call each other). `zcproto.serve` imports this package only if the configuration has several workers, and nothing
below it does.
"""
