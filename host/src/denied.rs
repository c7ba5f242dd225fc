//! What `wasi:http` does while no grant exists: the interface is there, so that programs link and
//! can handle the refusal, and every request is answered with HTTP-request-denied.

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime_wasi_http::p2::bindings::http::{outgoing_handler, types};
use wasmtime_wasi_http::p2::types::{HostFutureIncomingResponse, HostOutgoingRequest};
use wasmtime_wasi_http::p2::{HttpResult, bindings};
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttp, WasiHttpHooks};

use crate::state::Host;

/// Hooks that never send anything.
#[derive(Debug, Default)]
pub(crate) struct Hooks;

type Sent = Result<
    (
        http::Response<WasiBody>,
        Box<dyn Future<Output = Result<(), Error>> + Send>,
    ),
    wasmtime_wasi_http::Error,
>;

impl WasiHttpHooks for Hooks {
    fn send_request(
        &mut self,
        _request: http::Request<WasiBody>,
        _options: Option<RequestOptions>,
        _done: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        Box::new(std::future::ready(Err(Error::HttpRequestDenied)))
    }
}

/// The outgoing handler: refuses before a request is even built.
struct Handler<'a>(&'a mut ResourceTable);

struct HasHandler;

impl HasData for HasHandler {
    type Data<'a> = Handler<'a>;
}

impl outgoing_handler::Host for Handler<'_> {
    fn handle(
        &mut self,
        request: Resource<HostOutgoingRequest>,
        _options: Option<Resource<types::RequestOptions>>,
    ) -> HttpResult<Resource<HostFutureIncomingResponse>> {
        self.0.delete(request)?;
        Err(types::ErrorCode::HttpRequestDenied.into())
    }
}

/// Links `wasi:http`.
pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let options = bindings::LinkOptions::default();
    types::add_to_linker::<Host, WasiHttp>(
        linker,
        &(&options).into(),
        wasmtime_wasi_http::WasiHttpView::http,
    )?;
    outgoing_handler::add_to_linker::<Host, HasHandler>(linker, |host| {
        host.common.calls += 1;
        Handler(&mut host.table)
    })
}
