//! What `wasi:http` does while no grant exists: the interface is there, so that programs link and
//! can handle the refusal, and every request is answered with HTTP-request-denied.

use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource};
use wasmtime_wasi_http::p2::bindings;
use wasmtime_wasi_http::p2::bindings::http::types;
use wasmtime_wasi_http::p2::types::{HostFutureIncomingResponse, HostOutgoingRequest};
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttp, WasiHttpHooks};

use crate::state::Host;

/// Hooks that never send anything.
#[derive(Debug, Default)]
pub(crate) struct Hooks;

type Sent = Result<
    (http::Response<WasiBody>, Box<dyn Future<Output = Result<(), Error>> + Send>),
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

/// Links `wasi:http`. The handler refuses before a request is even built.
pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let options = bindings::LinkOptions::default();
    types::add_to_linker::<Host, WasiHttp>(
        linker,
        &(&options).into(),
        wasmtime_wasi_http::WasiHttpView::http,
    )?;
    linker.instance("wasi:http/outgoing-handler@0.2.0")?.func_wrap("handle", handle)
}

type Handled = Result<Resource<HostFutureIncomingResponse>, types::ErrorCode>;

fn handle(
    mut cx: StoreContextMut<'_, Host>,
    (request, _options): (Resource<HostOutgoingRequest>, Option<Resource<types::RequestOptions>>),
) -> wasmtime::Result<(Handled,)> {
    let host = cx.data_mut();
    host.common.calls += 1;
    host.table.delete(request)?;
    Ok((Err(types::ErrorCode::HttpRequestDenied),))
}
