//! `sandbar:task/secrets`: values of secrets that the grant shows to the task. Keeps none.

use super::call::{Answer, Ask, RefusalKind};
use super::generated::sandbar::task::secrets;
use crate::state::Host;
use secrets::Error;

impl secrets::Host for Host {
    async fn reveal(&mut self, name: String) -> Result<Vec<u8>, Error> {
        match self.ask(Ask::Secret { name }).await {
            Ok(Answer::Secret(Some(value))) => Ok(value.0),
            Ok(Answer::Secret(None)) => Err(Error::NotFound),
            Ok(_) => Err(Error::Other("the worker's answer is not understood".to_owned())),
            Err(refusal) => Err(match refusal.kind {
                RefusalKind::Denied => Error::AccessDenied,
                RefusalKind::Refused | RefusalKind::Failed => Error::Other(refusal.message),
            }),
        }
    }
}
