use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::task::{Context, Poll};

/// All of several operations, to be awaited. See [`Process::all`](crate::Process::all).
///
/// At every wake it looks at each operation that is not ready, so it costs no waker, and the process may leave memory.
#[must_use = "nothing happens before it is awaited"]
pub struct All<F: Future> {
    operations: Vec<One<F>>,
}

enum One<F: Future> {
    Open(Pin<Box<F>>),
    Ready(Option<F::Output>),
}

impl<F: Future> All<F> {
    pub(crate) fn new<I: IntoFuture<IntoFuture = F>>(operations: impl IntoIterator<Item = I>) -> Self {
        Self { operations: operations.into_iter().map(|one| One::Open(Box::pin(one.into_future()))).collect() }
    }
}

// The futures are boxed, and outputs are never pinned.
impl<F: Future> Unpin for All<F> {}

impl<F: Future> Future for All<F> {
    type Output = Vec<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut open = false;
        for one in &mut self.operations {
            if let One::Open(future) = one {
                match future.as_mut().poll(cx) {
                    Poll::Ready(output) => *one = One::Ready(Some(output)),
                    Poll::Pending => open = true,
                }
            }
        }
        if open {
            return Poll::Pending;
        }
        let ready = |one| match one {
            One::Ready(output) => output,
            One::Open(_) => None,
        };
        Poll::Ready(std::mem::take(&mut self.operations).into_iter().filter_map(ready).collect())
    }
}
