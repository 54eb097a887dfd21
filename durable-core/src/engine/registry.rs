use serde::de::DeserializeOwned;
use serde::ser::Serialize;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::run::Run;
use crate::error::ProcessError;
use crate::payload;
use crate::process::Process;
use crate::storage::Status;

/// How a process's function ended.
pub(crate) enum Ended {
    Output { status: Status, output: Option<Box<str>>, reason: Option<Box<str>> },
    Unencodable(String),
}

/// A registered function, without its types.
pub(crate) trait Entry: Send + Sync {
    /// Calls the function. `Err` says why the input does not decode.
    fn start(&self, run: Arc<Run>, input: &str) -> Result<Pin<Box<dyn Future<Output = Ended> + Send>>, String>;
}

pub(crate) struct Typed<F, I, O, E, R> {
    pub(crate) function: F,
    pub(crate) types: std::marker::PhantomData<fn(I, R) -> Result<O, E>>,
}

impl<F, Fut, I, O, E, R> Entry for Typed<F, I, O, E, R>
where
    F: Fn(Process, I) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<O, R>> + Send + 'static,
    R: Into<E> + 'static,
    I: DeserializeOwned + Send + 'static,
    O: Serialize + DeserializeOwned + Send + 'static,
    E: ProcessError,
{
    fn start(&self, run: Arc<Run>, input: &str) -> Result<Pin<Box<dyn Future<Output = Ended> + Send>>, String> {
        let input = payload::decode::<I>(input)?;
        let future = (self.function)(Process::new(run), input);
        Ok(Box::pin(async move {
            match future.await {
                Ok(output) => encoded(Status::Completed, output, None),
                Err(error) => {
                    let error: E = error.into();
                    let status = if error.is_cancelled() { Status::Cancelled } else { Status::Failed };
                    let reason = error.to_string().chars().take(4000).filter(|c| *c != '\0').collect::<String>();
                    encoded(status, error, Some(reason.into()))
                }
            }
        }))
    }
}

fn encoded<T: Serialize + DeserializeOwned>(status: Status, value: T, reason: Option<Box<str>>) -> Ended {
    match payload::encode_back(value) {
        Ok((output, _)) => Ended::Output { status, output: Some(output), reason },
        Err(error) => Ended::Unencodable(error.to_string()),
    }
}
