//! `wasi:config`: texts that people have set on a task. Asked for once in an attempt, so that they are of one moment.

use super::call::{Answer, Ask};
use super::generated::wasi::config::store;
use crate::state::Host;
use store::Error;

impl Host {
    async fn config(&mut self) -> Result<&[(String, String)], Error> {
        if self.config.is_none() {
            let answer = self.ask(Ask::Config).await.map_err(|refusal| Error::Upstream(refusal.message))?;
            let Answer::Config(pairs) = answer else {
                return Err(Error::Upstream("the worker's answer is not understood".to_owned()));
            };
            self.config = Some(pairs);
        } else {
            self.common.calls += 1;
        }
        Ok(self.config.as_deref().unwrap_or_default())
    }
}

impl store::Host for Host {
    async fn get(&mut self, key: String) -> Result<Option<String>, Error> {
        let found = self.config().await?.iter().find(|(name, _)| *name == key);
        Ok(found.map(|(_, value)| value.clone()))
    }

    async fn get_all(&mut self) -> Result<Vec<(String, String)>, Error> {
        Ok(self.config().await?.to_vec())
    }
}
