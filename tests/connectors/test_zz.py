import collections
C=collections.Counter()
import tests.connectors.test_model as m
o=m.Model.run
def run(self,seen,**k):
    try: a=o(self,seen,**k)
    except m.Refused: C['refused']+=1; raise
    except m.Stopped as s: C['stop '+','.join(sorted(s.args[0]))]+=1; raise
    C['run '+self.stream.mode+' '+str(self.stream.cursor)]+=1
    C['rows>0']+=bool(a.rows); C['known']+= self.known is not None
    C['changed cols']+= self.known is not None and self.types!=a.types
    return a
m.Model.run=run
oc=m.Story._recover
def rec(self): C['recovered']+=1; return oc(self)
m.Story._recover=rec
import pytest
import time
quiet=m.quiet
pytestmark=m.pytestmark
T=collections.Counter()
def timed(cls,n):
    f=getattr(cls,n)
    def w(*a,**k):
        t=time.time()
        try: return f(*a,**k)
        finally: T[n]+=time.time()-t; T[n+'#']+=1
    setattr(cls,n,w)
for n in 'begin forget sync crash _recover _seen _compare insert hold'.split(): timed(m.Story,n)
timed(m.World,'apply')
timed(m.World,'step')
@pytest.mark.parametrize("kind", m.KINDS)
def test_after(quiet,kind):
    m._tell(quiet, kind, examples=5); print(C); print(T)
