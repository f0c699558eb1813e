"""What `method=my_kd` computes: mean_j ((s_j - t_j) / scale)^2 for each sample."""

from pipeline.training.step import StudentStep


class MyKd(StudentStep):
    def lesson(self, seen, y):
        return {"t": self.compared(seen[0].logits) / self.method.scale}

    def terms(self, student, lesson, batch, moment):
        return {"my_kd": (self.compared(student.logits) / self.method.scale - lesson["t"]).square().mean(dim=1)}
