"""Jobs to copy from: each works on real input, reports what it does and obeys START, STOP, PAUSE, RESUME and CONFIG."""
