//! HTTP in native tests: whoever the test names answers, and nobody else.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Error, Request, Response};

type Answer = Rc<dyn Fn(&Request) -> Result<Response, Error>>;

thread_local! {
    static ANSWER: RefCell<Option<Answer>> = const { RefCell::new(None) };
}

/// As long as it lives, requests of this thread are answered as [`answer`] was told.
#[must_use]
pub struct Answering(Option<Answer>);

impl Drop for Answering {
    fn drop(&mut self) {
        ANSWER.with(|slot| *slot.borrow_mut() = self.0.take());
    }
}

/// Answers the requests of this thread in a native test. Without it every request is denied.
pub fn answer(how: impl Fn(&Request) -> Result<Response, Error> + 'static) -> Answering {
    Answering(ANSWER.with(|slot| slot.borrow_mut().replace(Rc::new(how))))
}

pub(super) fn send(request: &Request) -> Result<Response, Error> {
    request.parts()?;
    let answer = ANSWER.with(|slot| slot.borrow().clone());
    let response = answer.ok_or_else(|| Error::new("HTTP-request-denied"))?(request)?;
    if response.body.len() > request.max_bytes {
        return Err(Error::new("HTTP-response-body-size"));
    }
    Ok(response)
}
