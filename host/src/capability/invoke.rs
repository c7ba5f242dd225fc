//! `sandbar:task/invoke`: starting other tasks. Owns nothing; bounds and rights are the worker's and the database's.

use super::call::{Answer, Ask, RefusalKind};
use super::generated::sandbar::task::invoke;
use crate::state::Host;
use invoke::Error;

impl invoke::Host for Host {
    async fn start(&mut self, task: String, input: Vec<u8>, key: Option<String>) -> Result<String, Error> {
        match self.ask(Ask::Start { task, input, key }).await {
            Ok(Answer::Started(id)) => Ok(id),
            Ok(_) => Err(Error::Other("the worker's answer is not understood".to_owned())),
            Err(refusal) => Err(match refusal.kind {
                RefusalKind::Denied => Error::AccessDenied,
                RefusalKind::Refused => Error::Refused(refusal.message),
                RefusalKind::Failed => Error::Other(refusal.message),
            }),
        }
    }
}
