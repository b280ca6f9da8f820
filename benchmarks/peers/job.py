"""The worker as a job of harnessd's, which the others need not pay for."""

from worker import work

from harnessd import Cradle


class Worker(Cradle):
    def run(self, name):
        return work(name, lambda seconds: self.get_msg(timeout=seconds))
